import ExecuTorch
import Foundation

enum ProgramError: LocalizedError {
    case missing
    case constant(String)

    var errorDescription: String? {
        switch self {
        case .missing: return "model.pte is not among the resources of the package."
        case .constant(let name): return "The program does not say its \(name); export it again."
        }
    }
}

extension Module {
    /// The program among this package's resources, mapped rather than read.
    static func ofThisPackage() throws -> Module {
        guard let file = Bundle.module.url(forResource: "model", withExtension: "pte") else {
            throw ProgramError.missing
        }
        return Module(filePath: file.path, loadMode: .mmap)
    }

    /// What a constant method of the program returns: one number, or several.
    func integers(_ method: String) throws -> [Int] {
        try execute(method).map { value in
            guard value.isInteger else { throw ProgramError.constant(method) }
            return value.integer
        }
    }

    func boolean(_ method: String) throws -> Bool {
        guard let value = try execute(method).first, value.isBoolean else {
            throw ProgramError.constant(method)
        }
        return value.boolean
    }
}
