// Declarations only: see README.md.
@file:Suppress("UNUSED_PARAMETER")

package org.tensorflow.lite

import java.io.Closeable
import java.io.File

class Interpreter(modelFile: File) : Closeable {
    fun getOutputTensorFromSignature(outputName: String, signatureKey: String): Tensor = TODO()

    fun runSignature(inputs: Map<String, Any>, outputs: Map<String, Any>, signatureKey: String): Unit = TODO()

    override fun close(): Unit = TODO()
}

interface Tensor {
    fun shape(): IntArray
}
