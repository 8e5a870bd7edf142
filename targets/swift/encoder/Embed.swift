import Tokenizers

extension TextEncoder {
    /// The embedding of a text, as long as the model makes it.
    public func embed(_ text: String) async throws -> [Float] {
        try await scores(tokenizer.encode(text: text)).values
    }
}
