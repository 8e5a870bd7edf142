import Foundation
import Tokenizers

/// Turns a stream of tokens into a stream of text, never showing half a character.
///
/// A character may span tokens, and some decoders drop the space before the first token they are given; so each
/// token is decoded behind the piece shown before it.
struct Detokenizer {
    private let tokenizer: any Tokenizer
    private var tokens: [Int] = []
    private var context = 0
    private var shown = 0

    init(_ tokenizer: any Tokenizer) {
        self.tokenizer = tokenizer
    }

    /// The text that this token completes, perhaps none.
    mutating func add(_ token: Int) -> String {
        tokens.append(token)
        let text = Array(tokenizer.decode(tokens: tokens).unicodeScalars)
        var stable = text.count
        // A replacement at the end may be the start of a character.
        while stable > 0, text[stable - 1] == "\u{FFFD}" { stable -= 1 }
        let new = stable > shown ? Self.string(text[shown..<stable]) : ""
        shown = max(shown, stable)
        if stable == text.count { forget() }
        return new
    }

    /// What is held back, as it is.
    mutating func flush() -> String {
        let text = Array(tokenizer.decode(tokens: tokens).unicodeScalars)
        defer { tokens = []; context = 0; shown = 0 }
        return shown < text.count ? Self.string(text[shown...]) : ""
    }

    /// Keep only the tokens since the last whole character as the context of the next.
    private mutating func forget() {
        let recent = Array(tokens[context...])
        let text = tokenizer.decode(tokens: recent).unicodeScalars
        if let first = text.first, first != "\u{FFFD}" {
            tokens = recent
            shown = text.count
        }
        context = tokens.count
    }

    private static func string(_ scalars: ArraySlice<Unicode.Scalar>) -> String {
        var view = String.UnicodeScalarView()
        view.append(contentsOf: scalars)
        return String(view)
    }
}
