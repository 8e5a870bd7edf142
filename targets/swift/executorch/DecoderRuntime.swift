import ExecuTorch
import Foundation

/// How the model runs. ExecuTorch with XNNPACK runs on the processor; there is nothing to choose.
public struct RuntimeConfiguration: Sendable {
    public init() {}
}

/// A decoder in ExecuTorch: one method, which keeps its cache inside.
final class DecoderRuntime {
    let context: Int
    let stopTokens: Set<Int>

    private let module: Module
    private let most: Int

    private enum Name {
        static let forward = "forward"
        static let context = "get_max_context_len"
        static let stopIds = "get_eos_ids"
        static let most = "get_max_seq_len"
    }

    private init(_ module: Module) throws {
        self.module = module
        context = try module.integers(Name.context)[0]
        most = try module.integers(Name.most)[0]
        stopTokens = Set(try module.integers(Name.stopIds))
    }

    static func load(_ configuration: RuntimeConfiguration) async throws -> DecoderRuntime {
        let module = try Module.ofThisPackage()
        try module.load(Name.forward)
        return try DecoderRuntime(module)
    }

    /// What is fed next at position 0 overwrites the cache, and nothing reads beyond its own position.
    func reset() {}

    /// Feed tokens at a position; the logits after the last of them.
    func logits(feeding tokens: [Int], at position: Int) async throws -> [Float] {
        var rest = tokens[...]
        var start = position
        var logits: [Float] = []
        while !rest.isEmpty {
            let piece = rest.prefix(most)
            rest = rest.dropFirst(piece.count)
            let ids = Tensor<Int64>(piece.map(Int64.init), shape: [1, piece.count])
            let output: Tensor<Float> = try module.forward([ids, Tensor<Int64>([Int64(start)])])
            start += piece.count
            if rest.isEmpty { logits = output.scalars() }
            try Task.checkCancellation()
        }
        return logits
    }
}
