"""TensorFlow models as a source: read, converted, judged and bundled."""
