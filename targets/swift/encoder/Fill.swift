import Tokenizers

extension TextEncoder {
    /// A word that may stand where one is missing, and how probable it is.
    public struct Word: Sendable {
        public let text: String
        public let probability: Float
    }

    /// The likeliest words for every mask of a text, best first.
    public func fill(_ text: String, count: Int = 5) async throws -> [[Word]] {
        let tokens = tokenizer.encode(text: text)
        let rows = try await scores(tokens)
        return tokens.indices.filter { tokens[$0] == Facts.maskToken }.map { place in
            let probabilities = rows[place].softmax()
            let best = probabilities.indices.sorted { probabilities[$0] > probabilities[$1] }.prefix(count)
            return best.map { token in
                Word(text: tokenizer.decode(tokens: [token]), probability: probabilities[token])
            }
        }
    }
}
