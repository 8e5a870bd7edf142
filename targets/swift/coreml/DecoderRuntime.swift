import Accelerate
import CoreML
import Foundation

/// How the model runs.
public struct RuntimeConfiguration: Sendable {
    /// Where Core ML may compute; what is fastest is worth measuring on the device. The default is
    /// where Apple runs the decoders of its own examples.
    public var computeUnits: MLComputeUnits

    public init(computeUnits: MLComputeUnits = .cpuAndGPU) {
        self.computeUnits = computeUnits
    }
}

/// A decoder in Core ML: one function for prompts and one for single tokens, over one cache.
final class DecoderRuntime {
    let context: Int
    let stopTokens: Set<Int>

    private let prefill: MLModel
    private let decode: MLModel
    private let most: Int
    private let lengths: [Int]?
    private let fixedWidth: Int?
    private let maskType: MLMultiArrayDataType
    private var cache: MLState

    private enum Name {
        static let prefill = "prefill"
        static let decode = "decode"
        static let inputIds = "inputIds"
        static let causalMask = "causalMask"
        static let logits = "logits"
        static let context = "slm_export.context"
        static let stopIds = "slm_export.stop_ids"
        static let most = "slm_export.prefill"
    }

    private init(prefill: MLModel, decode: MLModel) throws {
        self.prefill = prefill
        self.decode = decode
        context = try prefill.number(Name.context)
        stopTokens = Set(try prefill.numbers(Name.stopIds))
        most = try prefill.number(Name.most)
        let inputs = prefill.modelDescription.inputDescriptionsByName
        lengths = Self.lengths(of: inputs[Name.inputIds])
        fixedWidth = Self.fixedWidth(of: inputs[Name.causalMask])
        maskType = inputs[Name.causalMask]?.multiArrayConstraint?.dataType ?? .float16
        cache = prefill.makeState()
    }

    static func load(_ configuration: RuntimeConfiguration) async throws -> DecoderRuntime {
        let prefill = try await CompiledModel.load(function: Name.prefill, configuration)
        let decode = try await CompiledModel.load(function: Name.decode, configuration)
        return try DecoderRuntime(prefill: prefill, decode: decode)
    }

    /// Forget what was fed.
    func reset() {
        cache = prefill.makeState()
    }

    /// Feed tokens at a position; the logits after the last of them.
    func logits(feeding tokens: [Int], at position: Int) async throws -> [Float] {
        var rest = tokens[...]
        var end = position
        var logits: [Float] = []
        while !rest.isEmpty {
            let piece = rest.prefix(nextLength(rest.count))
            rest = rest.dropFirst(piece.count)
            end += piece.count
            let inputs = try MLDictionaryFeatureProvider(dictionary: [
                Name.inputIds: MLFeatureValue(multiArray: try MLMultiArray(row: piece)),
                Name.causalMask: MLFeatureValue(multiArray: try mask(queries: piece.count, end: end)),
            ])
            let model = piece.count == 1 ? decode : prefill
            let outputs = try await model.prediction(from: inputs, using: cache)
            if rest.isEmpty {
                guard let all = outputs.featureValue(for: Name.logits)?.multiArrayValue else {
                    throw CompiledModelError.output(Name.logits)
                }
                logits = Self.row(piece.count - 1, of: all)
            }
            try Task.checkCancellation()
        }
        return logits
    }

    /// How many of the tokens that are left the next call takes.
    private func nextLength(_ left: Int) -> Int {
        guard let lengths else { return min(left, most) }
        return lengths.filter { $0 <= min(left, most) }.max() ?? 1
    }

    /// The lengths that `prefill` was made for; nil where it takes any.
    private static func lengths(of input: MLFeatureDescription?) -> [Int]? {
        guard let constraint = input?.multiArrayConstraint else { return nil }
        switch constraint.shapeConstraint.type {
        case .range: return nil
        case .enumerated: return constraint.shapeConstraint.enumeratedShapes.map { $0[1].intValue }
        default: return [constraint.shape[1].intValue]
        }
    }

    /// The columns that every mask has, as wide as the cache; nil where a mask ends with the last token.
    private static func fixedWidth(of mask: MLFeatureDescription?) -> Int? {
        guard let constraint = mask?.multiArrayConstraint, constraint.shapeConstraint.type != .range else { return nil }
        return constraint.shape[3].intValue
    }

    /// (1, 1, queries, width): 0 where a token sees another, itself and those before it, -infinity elsewhere.
    private func mask(queries: Int, end: Int) throws -> MLMultiArray {
        let width = fixedWidth ?? end
        let shape: [NSNumber] = [1, 1, queries as NSNumber, width as NSNumber]
        let mask = try MLMultiArray(shape: shape, dataType: maskType)
        mask.withUnsafeMutableBytes { bytes, strides in
            // Float16 is not a type on every Mac, but its bits are known.
            if maskType == .float16 {
                Self.fill(bytes.bindMemory(to: UInt16.self), strides, queries, end, width, hidden: 0xFC00)
            } else {
                Self.fill(bytes.bindMemory(to: Float.self), strides, queries, end, width, hidden: -.infinity)
            }
        }
        return mask
    }

    private static func fill<Scalar: Numeric>(
        _ mask: UnsafeMutableBufferPointer<Scalar>, _ strides: [Int], _ queries: Int, _ end: Int, _ width: Int,
        hidden: Scalar
    ) {
        for query in 0..<queries {
            let last = end - queries + query
            for key in 0..<width { mask[query * strides[2] + key * strides[3]] = key <= last ? 0 : hidden }
        }
    }

    /// One row of logits (1, queries, vocabulary), which are float16 or float32.
    private static func row(_ index: Int, of logits: MLMultiArray) -> [Float] {
        let count = logits.shape[2].intValue
        let strides = logits.strides.map(\.intValue)
        var values = [Float](repeating: 0, count: count)
        let half = logits.dataType == .float16
        guard strides[2] == 1, half || logits.dataType == .float32 else {
            for token in 0..<count { values[token] = logits[[0, index as NSNumber, token as NSNumber]].floatValue }
            return values
        }
        let width = half ? MemoryLayout<UInt16>.size : MemoryLayout<Float>.size
        logits.withUnsafeBytes { bytes in
            let row = UnsafeRawBufferPointer(rebasing: bytes[(index * strides[1] * width)...].prefix(count * width))
            values.withUnsafeMutableBytes { target in
                if half {
                    widen(row, into: target, count: count)
                } else {
                    target.copyMemory(from: row)
                }
            }
        }
        return values
    }

    private static func widen(_ halves: UnsafeRawBufferPointer, into floats: UnsafeMutableRawBufferPointer, count: Int) {
        var source = vImage_Buffer(
            data: UnsafeMutableRawPointer(mutating: halves.baseAddress!), height: 1, width: vImagePixelCount(count),
            rowBytes: halves.count)
        var target = vImage_Buffer(
            data: floats.baseAddress!, height: 1, width: vImagePixelCount(count), rowBytes: floats.count)
        vImageConvert_Planar16FtoPlanarF(&source, &target, 0)
    }
}
