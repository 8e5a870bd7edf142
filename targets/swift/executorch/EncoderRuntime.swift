import ExecuTorch
import Foundation

/// How the model runs. ExecuTorch with XNNPACK runs on the processor; there is nothing to choose.
public struct RuntimeConfiguration: Sendable {
    public init() {}
}

/// An encoder in ExecuTorch, for any length up to its longest.
final class EncoderRuntime {
    /// The most tokens of a text.
    let context: Int

    private let module: Module
    private let least: Int
    private let takesTypes: Bool

    private enum Name {
        static let forward = "forward"
        static let most = "get_max_seq_len"
        static let least = "get_min_seq_len"
        static let takesTypes = "takes_token_types"
    }

    private init(_ module: Module) throws {
        self.module = module
        context = try module.integers(Name.most)[0]
        least = try module.integers(Name.least)[0]
        takesTypes = try module.boolean(Name.takesTypes)
    }

    static func load(_ configuration: RuntimeConfiguration) async throws -> EncoderRuntime {
        let module = try Module.ofThisPackage()
        try module.load(Name.forward)
        return try EncoderRuntime(module)
    }

    /// The output for tokens, without its batch, and its shape.
    func output(_ tokens: [Int], types: [Int]) async throws -> Scores {
        let padding = Array(repeating: 0, count: max(0, least - tokens.count))
        var inputs: [[Int]] = [
            tokens + Array(repeating: Facts.padToken, count: padding.count),
            tokens.map { _ in 1 } + padding,
        ]
        if takesTypes { inputs.append(types + padding) }
        let tensors = inputs.map { Tensor<Int64>($0.map(Int64.init), shape: [1, $0.count]) }
        let output: Tensor<Float> = try module.forward(tensors)
        return Scores(values: output.scalars(), shape: Array(output.shape.dropFirst()))
    }
}
