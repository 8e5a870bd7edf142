import Foundation

/// Chooses the next token from the logits of all.
struct Sampler {
    let temperature: Float
    let topP: Float

    func choose(_ logits: [Float]) -> Int {
        var best = 0
        for token in logits.indices where logits[token] > logits[best] { best = token }
        guard temperature > 0 else { return best }
        // Less the largest, so that no exponential overflows.
        let weights = logits.map { exp(Double(($0 - logits[best]) / temperature)) }
        let total = weights.reduce(0, +)
        let order = weights.indices.sorted { weights[$0] > weights[$1] }
        var kept = 0.0
        var count = 0
        // A token is kept while those before it have not reached topP; so the first always is.
        while count < order.count, count == 0 || kept < Double(topP) * total {
            kept += weights[order[count]]
            count += 1
        }
        var left = Double.random(in: 0..<kept)
        for token in order.prefix(count) {
            left -= weights[token]
            if left < 0 { return token }
        }
        return order[count - 1]
    }
}
