// Declarations only: see README.md.
@file:Suppress("UNUSED_PARAMETER")

package org.pytorch.executorch

open class Module private constructor() {
    open fun forward(vararg inputs: EValue): Array<EValue> = TODO()

    open fun execute(methodName: String, vararg inputs: EValue): Array<EValue> = TODO()

    open fun destroy(): Unit = TODO()

    companion object {
        const val LOAD_MODE_MMAP = 1

        @JvmStatic fun load(modelPath: String?, loadMode: Int = 0, numThreads: Int = 0): Module = TODO()
    }
}

class EValue private constructor() {
    fun toInt(): Long = TODO()

    fun toTensor(): Tensor = TODO()

    companion object {
        @JvmStatic fun from(tensor: Tensor): EValue = TODO()
    }
}

abstract class Tensor {
    abstract val dataAsFloatArray: FloatArray

    fun shape(): LongArray = TODO()

    companion object {
        @JvmStatic fun fromBlob(data: LongArray, shape: LongArray): Tensor = TODO()
    }
}
