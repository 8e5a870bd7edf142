import Foundation
import Tokenizers

/// How a text is written.
public struct GenerationOptions: Sendable {
    /// The most tokens to write.
    public var maximumTokens: Int
    /// 0 takes the likeliest token each time; higher values vary more.
    public var temperature: Float
    /// The next token is one of the likeliest that together have this probability.
    public var topP: Float

    public init(maximumTokens: Int = 256, temperature: Float = 0, topP: Float = 1) {
        self.maximumTokens = maximumTokens
        self.temperature = temperature
        self.topP = topP
    }
}

public enum LanguageModelError: LocalizedError {
    case emptyPrompt
    case longPrompt(tokens: Int, context: Int)

    public var errorDescription: String? {
        switch self {
        case .emptyPrompt:
            return "The prompt is empty."
        case .longPrompt(let tokens, let context):
            return "The prompt has \(tokens) tokens, but the context holds \(context); shorten it."
        }
    }
}

/// The language model of this package: loaded once, it writes one text at a time.
///
///     let model = try await LanguageModel.load()
///     for try await piece in model.generate("Once upon a time") { print(piece, terminator: "") }
public actor LanguageModel {
    /// The most tokens of prompt and answer together.
    public nonisolated let context: Int
    public nonisolated let tokenizer: any Tokenizer

    private let runtime: DecoderRuntime
    private var latest: Task<Void, any Error>?

    private init(runtime: DecoderRuntime, tokenizer: any Tokenizer) {
        self.context = runtime.context
        self.runtime = runtime
        self.tokenizer = tokenizer
    }

    /// Open the model and its tokenizer. The first time takes longest.
    public static func load(_ configuration: RuntimeConfiguration = .init()) async throws -> LanguageModel {
        let tokenizer = try await TokenizerFiles.load()
        return LanguageModel(runtime: try await DecoderRuntime.load(configuration), tokenizer: tokenizer)
    }

    /// Go on from a prompt, taken as it is. Leaving the loop, or cancelling its task, ends the work.
    public nonisolated func generate(
        _ prompt: String, options: GenerationOptions = .init()
    ) -> AsyncThrowingStream<String, any Error> {
        stream(options) { $0.encode(text: prompt) }
    }

    /// Answer the last of some messages, by the model's own chat template: ["role": "user", "content": "..."].
    public nonisolated func generate(
        chat messages: [[String: String]], options: GenerationOptions = .init()
    ) -> AsyncThrowingStream<String, any Error> {
        stream(options) { try $0.applyChatTemplate(messages: messages) }
    }

    private nonisolated func stream(
        _ options: GenerationOptions, prompt: @escaping @Sendable (any Tokenizer) throws -> [Int]
    ) -> AsyncThrowingStream<String, any Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    let tokens = try prompt(self.tokenizer)
                    try await self.write(tokens, options) { _ = continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// There is one cache, so a text waits for the one before it.
    private func write(
        _ prompt: [Int], _ options: GenerationOptions, emit: @escaping @Sendable (String) -> Void
    ) async throws {
        let previous = latest
        let task = Task {
            _ = await previous?.result
            try await self.steps(prompt, options, emit: emit)
        }
        latest = task
        try await withTaskCancellationHandler {
            try await task.value
        } onCancel: {
            task.cancel()
        }
    }

    private func steps(
        _ prompt: [Int], _ options: GenerationOptions, emit: @Sendable (String) -> Void
    ) async throws {
        guard !prompt.isEmpty else { throw LanguageModelError.emptyPrompt }
        guard prompt.count < context else {
            throw LanguageModelError.longPrompt(tokens: prompt.count, context: context)
        }
        runtime.reset()
        let sampler = Sampler(temperature: options.temperature, topP: options.topP)
        var detokenizer = Detokenizer(tokenizer)
        var fed = prompt
        var position = 0
        for _ in 0..<max(0, options.maximumTokens) {
            try Task.checkCancellation()
            let logits = try await runtime.logits(feeding: fed, at: position)
            position += fed.count
            let token = sampler.choose(logits)
            if runtime.stopTokens.contains(token) { break }
            let piece = detokenizer.add(token)
            if !piece.isEmpty { emit(piece) }
            if position >= context { break }
            fed = [token]
        }
        let rest = detokenizer.flush()
        if !rest.isEmpty { emit(rest) }
    }
}
