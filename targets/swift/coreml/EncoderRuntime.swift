import CoreML
import Foundation

/// How the model runs.
public struct RuntimeConfiguration: Sendable {
    /// Where Core ML may compute; what is fastest is worth measuring on the device.
    public var computeUnits: MLComputeUnits

    public init(computeUnits: MLComputeUnits = .all) {
        self.computeUnits = computeUnits
    }
}

/// An encoder in Core ML, made for a few lengths: a shorter text is filled up to the next.
final class EncoderRuntime {
    /// The most tokens of a text.
    let context: Int

    private let model: MLModel
    private let lengths: [Int]
    private let takesTypes: Bool

    private enum Name {
        static let ids = "input_ids"
        static let mask = "attention_mask"
        static let types = "token_type_ids"
        static let lengths = "slm_export.lengths"
    }

    private init(_ model: MLModel) throws {
        self.model = model
        lengths = try model.numbers(Name.lengths).sorted()
        guard let longest = lengths.last else { throw CompiledModelError.metadata(Name.lengths) }
        context = longest
        takesTypes = model.modelDescription.inputDescriptionsByName[Name.types] != nil
    }

    static func load(_ configuration: RuntimeConfiguration) async throws -> EncoderRuntime {
        try EncoderRuntime(try await CompiledModel.load(configuration))
    }

    /// The output for tokens, without its batch, and its shape.
    func output(_ tokens: [Int], types: [Int]) async throws -> Scores {
        let length = lengths.first { $0 >= tokens.count } ?? context
        let padding = Array(repeating: 0, count: length - tokens.count)
        var inputs: [String: [Int]] = [
            Name.ids: tokens + Array(repeating: Facts.padToken, count: padding.count),
            Name.mask: tokens.map { _ in 1 } + padding,
        ]
        if takesTypes { inputs[Name.types] = types + padding }
        let arrays = try inputs.mapValues { MLFeatureValue(multiArray: try MLMultiArray(row: $0)) }
        let outputs = try await model.prediction(from: MLDictionaryFeatureProvider(dictionary: arrays))
        guard let array = outputs.featureValue(for: Facts.output)?.multiArrayValue else {
            throw CompiledModelError.output(Facts.output)
        }
        let values = MLShapedArray<Float>(converting: array)
        return Scores(values: values.scalars, shape: Array(values.shape.dropFirst()))
    }
}
