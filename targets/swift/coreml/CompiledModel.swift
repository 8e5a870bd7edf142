import CoreML
import Foundation

enum CompiledModelError: LocalizedError {
    case missing
    case metadata(String)
    case output(String)

    var errorDescription: String? {
        switch self {
        case .missing: return "Model.mlpackage is not among the resources of the package."
        case .metadata(let key): return "The model does not say its \(key); export it again."
        case .output(let name): return "The model gave no array named \(name); export it again."
        }
    }
}

/// The model as Core ML opens it: compiled, which is done once for each version of the model.
enum CompiledModel {
    static func load(function: String? = nil, _ configuration: RuntimeConfiguration) async throws -> MLModel {
        let settings = MLModelConfiguration()
        settings.computeUnits = configuration.computeUnits
        if #available(iOS 18, macOS 15, *), let function { settings.functionName = function }
        return try await MLModel.load(contentsOf: compiled(), configuration: settings)
    }

    /// Where the compiled model is: in the app if its build compiled it, else in the caches folder.
    private static func compiled() async throws -> URL {
        if let built = Bundle.module.url(forResource: "Model", withExtension: "mlmodelc") { return built }
        guard let package = Bundle.module.url(forResource: "Model", withExtension: "mlpackage") else {
            throw CompiledModelError.missing
        }
        let files = FileManager.default
        let caches = try files.url(for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        let home = caches.appendingPathComponent("slm-export", isDirectory: true)
            .appendingPathComponent(Facts.name, isDirectory: true)
        let place = home.appendingPathComponent("\(Facts.sha256).mlmodelc", isDirectory: true)
        if files.fileExists(atPath: place.path) { return place }
        let fresh = try await MLModel.compileModel(at: package)
        // What is there is of an older version of the model.
        try? files.removeItem(at: home)
        try files.createDirectory(at: home, withIntermediateDirectories: true)
        do {
            try files.moveItem(at: fresh, to: place)
        } catch where files.fileExists(atPath: place.path) {
            // Another load was quicker.
            try? files.removeItem(at: fresh)
        }
        return place
    }
}

extension MLModel {
    /// What the exporter wrote into the model under a name.
    func fact(_ key: String) throws -> String {
        let facts = modelDescription.metadata[.creatorDefinedKey] as? [String: String]
        guard let value = facts?[key] else { throw CompiledModelError.metadata(key) }
        return value
    }

    func number(_ key: String) throws -> Int {
        guard let value = Int(try fact(key)) else { throw CompiledModelError.metadata(key) }
        return value
    }

    func numbers(_ key: String) throws -> [Int] {
        try JSONDecoder().decode([Int].self, from: Data(try fact(key).utf8))
    }
}

extension MLMultiArray {
    /// Tokens, or a mask of them: (1, n).
    convenience init(row values: some Collection<Int>) throws {
        try self.init(shape: [1, values.count as NSNumber], dataType: .int32)
        withUnsafeMutableBytes { bytes, strides in
            let numbers = bytes.bindMemory(to: Int32.self)
            for (index, value) in values.enumerated() { numbers[index * strides[1]] = Int32(value) }
        }
    }
}
