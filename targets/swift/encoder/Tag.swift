import Tokenizers

extension TextEncoder {
    /// A token of a text, and its likeliest label.
    public struct Tag: Sendable {
        public let text: String
        public let label: String
    }

    /// The label of every token of a text, those that the tokenizer adds included.
    public func tag(_ text: String) async throws -> [Tag] {
        let tokens = tokenizer.encode(text: text)
        let rows = try await scores(tokens)
        return tokens.enumerated().map { place, token in
            Tag(text: tokenizer.decode(tokens: [token]), label: Facts.labels[rows[place].best()])
        }
    }
}
