// Declarations only: see README.md.
@file:Suppress("UNUSED_PARAMETER")

package android.content

import java.io.File
import java.io.InputStream

abstract class AssetManagerStandIn {
    abstract fun open(fileName: String): InputStream
}

abstract class Context {
    abstract val assets: AssetManagerStandIn
    abstract val noBackupFilesDir: File
}
