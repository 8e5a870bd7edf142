import Foundation
import Tokenizers

/// The tokenizer of the model, among the resources of the package.
enum TokenizerFiles {
    /// Its files lie at the top of the resources.
    static func load() async throws -> any Tokenizer {
        guard let file = Bundle.module.url(forResource: "tokenizer", withExtension: "json") else {
            throw CocoaError(.fileNoSuchFile, userInfo: [NSFilePathErrorKey: "tokenizer.json"])
        }
        return try await AutoTokenizer.from(modelFolder: file.deletingLastPathComponent())
    }
}
