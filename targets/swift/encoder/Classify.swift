import Tokenizers

extension TextEncoder {
    /// A class of the model, and how probable it is.
    public struct Prediction: Sendable {
        public let label: String
        public let probability: Float
    }

    /// The classes of a text, likeliest first.
    public func classify(_ text: String) async throws -> [Prediction] {
        let probabilities = try await scores(tokenizer.encode(text: text)).values[...].softmax()
        return zip(Facts.labels, probabilities)
            .map { Prediction(label: $0, probability: $1) }
            .sorted { $0.probability > $1.probability }
    }
}
