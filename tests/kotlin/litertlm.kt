// Declarations only: see README.md.
@file:Suppress("UNUSED_PARAMETER")

package com.google.ai.edge.litertlm

import java.io.Closeable

sealed class Backend(val name: String) {
    data class CPU(val threadCount: Int? = null, val numOfThreads: Int? = null) : Backend("CPU")
}

data class SamplerConfig(val topK: Int, val topP: Double, val temperature: Double, val seed: Int = 0)

class LoraConfig

data class SessionConfig(
    val samplerConfig: SamplerConfig? = null,
    val loraConfig: LoraConfig? = null,
    val enableSpeculativeDecoding: Boolean? = null
)

data class EngineConfig(
    val modelPath: String,
    val backend: Backend = Backend.CPU(),
    val visionBackend: Backend? = null,
    val audioBackend: Backend? = null,
    val maxNumTokens: Int? = null,
    val maxNumImages: Int? = null,
    val cacheDir: String? = null
)

class Engine(val engineConfig: EngineConfig) : Closeable {
    fun initialize(): Unit = TODO()

    fun createSession(sessionConfig: SessionConfig = SessionConfig()): Session = TODO()

    override fun close(): Unit = TODO()
}

sealed class InputData {
    data class Text(val text: String) : InputData()
}

interface ResponseCallback {
    fun onNext(response: String) {}

    fun onDone() {}

    fun onError(throwable: Throwable) {}
}

class Session(private val handle: Long) : Closeable {
    fun generateContentStream(inputData: List<InputData>, responseCallback: ResponseCallback): Unit = TODO()

    fun cancelProcess(): Unit = TODO()

    override fun close(): Unit = TODO()
}
