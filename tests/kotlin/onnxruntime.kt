// Declarations only: see README.md.
@file:Suppress("UNUSED_PARAMETER")

package ai.onnxruntime

import java.io.Closeable
import java.nio.FloatBuffer
import java.nio.LongBuffer

class OrtEnvironment private constructor() {
    fun createSession(modelPath: String, options: OrtSession.SessionOptions): OrtSession = TODO()

    companion object {
        @JvmStatic fun getEnvironment(): OrtEnvironment = TODO()
    }
}

interface OnnxValue : Closeable

class TensorInfo private constructor() {
    val shape: LongArray get() = TODO()
}

class OnnxTensor private constructor() : OnnxValue {
    val floatBuffer: FloatBuffer get() = TODO()

    val info: TensorInfo get() = TODO()

    override fun close(): Unit = TODO()

    companion object {
        @JvmStatic fun createTensor(env: OrtEnvironment, data: LongBuffer, shape: LongArray): OnnxTensor = TODO()
    }
}

class OrtSession private constructor() : Closeable {
    fun run(inputs: Map<String, OnnxTensor>, requestedOutputs: Set<String>): Result = TODO()

    override fun close(): Unit = TODO()

    class SessionOptions : Closeable {
        override fun close(): Unit = TODO()
    }

    class Result private constructor() : Closeable {
        fun get(index: Int): OnnxValue = TODO()

        override fun close(): Unit = TODO()
    }
}
