// Declarations only: see README.md.
@file:Suppress("UNUSED_PARAMETER")

package org.pytorch.executorch.extension.llm

interface LlmCallback {
    fun onResult(result: String)

    fun onStats(stats: String) {}

    fun onError(errorCode: Int, message: String) {}
}

class LlmModule(modelType: Int, modulePath: String, tokenizerPath: String, temperature: Float) {
    fun generate(
        prompt: String,
        seqLen: Int,
        llmCallback: LlmCallback,
        echo: Boolean,
        temperature: Float,
        numBos: Int,
        numEos: Int
    ): Unit = TODO()

    fun resetContext(): Unit = TODO()

    fun stop(): Unit = TODO()

    fun load(): Unit = TODO()

    fun resetNative(): Unit = TODO()

    companion object {
        const val MODEL_TYPE_TEXT = 1
    }
}
