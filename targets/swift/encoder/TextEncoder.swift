import Foundation
import Tokenizers

public enum TextEncoderError: LocalizedError {
    case longText(tokens: Int, most: Int)

    public var errorDescription: String? {
        switch self {
        case .longText(let tokens, let most):
            return "The text has \(tokens) tokens, but the model takes at most \(most)."
        }
    }
}

/// What an encoder gives, row by row.
struct Scores {
    let values: [Float]
    let shape: [Int]

    subscript(row: Int) -> ArraySlice<Float> {
        let width = shape.last ?? values.count
        return values[(row * width)..<((row + 1) * width)]
    }
}

/// The encoder of this package, loaded once.
public actor TextEncoder {
    public nonisolated let tokenizer: any Tokenizer
    /// The most tokens of a text; a longer one is an error, never cut.
    public nonisolated let context: Int

    private let runtime: EncoderRuntime
    private var latest: Task<Scores, any Error>?

    private init(runtime: EncoderRuntime, tokenizer: any Tokenizer) {
        self.context = runtime.context
        self.runtime = runtime
        self.tokenizer = tokenizer
    }

    /// Open the model and its tokenizer. The first time takes longest.
    public static func load(_ configuration: RuntimeConfiguration = .init()) async throws -> TextEncoder {
        let tokenizer = try await TokenizerFiles.load()
        return TextEncoder(runtime: try await EncoderRuntime.load(configuration), tokenizer: tokenizer)
    }

    /// One text at a time: the runtime is not made for several.
    func scores(_ tokens: [Int], types: [Int]? = nil) async throws -> Scores {
        guard tokens.count <= context else {
            throw TextEncoderError.longText(tokens: tokens.count, most: context)
        }
        let previous = latest
        let task = Task {
            _ = await previous?.result
            return try await self.runtime.output(tokens, types: types ?? tokens.map { _ in 0 })
        }
        latest = task
        return try await task.value
    }
}

extension ArraySlice<Float> {
    /// As probabilities.
    func softmax() -> [Float] {
        let largest = self.max() ?? 0
        let weights = map { exp($0 - largest) }
        let total = weights.reduce(0, +)
        return weights.map { $0 / total }
    }

    /// The place of the largest, counted from 0.
    func best() -> Int {
        indices.max { self[$0] < self[$1] }.map { $0 - startIndex } ?? 0
    }
}
