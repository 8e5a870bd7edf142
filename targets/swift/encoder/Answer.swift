import Tokenizers

extension TextEncoder {
    /// The stretch of a passage that answers a question.
    public func answer(_ question: String, in passage: String) async throws -> String {
        let (opening, middle, closing) = (Facts.pairOpening, Facts.pairMiddle, Facts.pairClosing)
        let first = opening + tokenizer.encode(text: question, addSpecialTokens: false) + middle
        let second = tokenizer.encode(text: passage, addSpecialTokens: false)
        let types = first.map { _ in 0 } + (second + closing).map { _ in Facts.pairType }
        let rows = try await scores(first + second + closing, types: types)
        // The answer lies in the passage: the best start, then the best end from there on.
        let places = first.count..<(first.count + second.count)
        guard !places.isEmpty else { return "" }
        let (starts, ends) = (Array(rows[0]), Array(rows[1]))
        var best = (score: -Float.infinity, start: places.lowerBound, end: places.lowerBound)
        var start = places.lowerBound
        for end in places {
            if starts[end] > starts[start] { start = end }
            let score = starts[start] + ends[end]
            if score > best.score { best = (score, start, end) }
        }
        let found = (best.start - first.count)...(best.end - first.count)
        return tokenizer.decode(tokens: Array(second[found]))
    }
}
