"""Small text models that Keras really trains: a class by which third of the vocabulary an input has most ids of.

python keras_models.py FOLDER
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, TOKENS, CLASSES = 300, 24, 3


def texts(count: int, seed: int) -> tuple[Any, Any]:
    """Return ids (count, TOKENS), filled up with 0, and their classes."""
    rng = np.random.default_rng(seed)
    ids, classes = np.zeros((count, TOKENS), np.int32), np.zeros(count, np.int32)
    for row in range(count):
        length = int(rng.integers(1, TOKENS + 1))
        drawn = rng.integers(1, VOCABULARY // CLASSES, length) * CLASSES
        lean = rng.random(length) < 0.6
        ids[row, :length] = drawn + np.where(lean, rng.integers(CLASSES), rng.integers(0, CLASSES, length))
        classes[row] = np.bincount(ids[row, :length] % CLASSES, minlength=CLASSES).argmax()
    return ids, classes


def lstm(keras: Any, tokens: int | None) -> Any:
    layers = keras.layers
    ids = keras.Input((tokens,), dtype="int32", name="tokens")
    x = layers.LSTM(40)(layers.Embedding(VOCABULARY, 32, mask_zero=True)(ids))
    return keras.Model(
        ids, layers.Dense(CLASSES, activation="softmax")(layers.Dense(24, activation="relu")(x))
    )


def transformer(keras: Any) -> Any:
    layers, ops = keras.layers, keras.ops
    ids = keras.Input((TOKENS,), dtype="int32", name="tokens")
    mask = keras.Input((TOKENS,), dtype="int32", name="token_mask")
    x = layers.Embedding(VOCABULARY, 32)(ids)
    seen = ops.not_equal(mask, 0)
    x = layers.LayerNormalization()(
        x + layers.MultiHeadAttention(4, 8)(x, x, attention_mask=seen[:, None, :])
    )
    x = layers.LayerNormalization()(x + layers.Dense(32)(layers.Dense(64, activation="gelu")(x)))
    return keras.Model([ids, mask], layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x, mask=seen)))


def embedder(keras: Any) -> Any:
    """A bidirectional GRU with a convolution: unit vectors, untrained."""
    layers = keras.layers
    ids = keras.Input((TOKENS,), dtype="int64", name="tokens")
    x = layers.Conv1D(32, 3, activation="tanh")(layers.Embedding(VOCABULARY, 32)(ids))
    x = layers.Dense(16)(layers.Bidirectional(layers.GRU(24))(x))
    return keras.Model(ids, layers.UnitNormalization()(x))


def judge_of_text(keras: Any) -> Any:
    """A yes or no on texts of the example model's tokenizer; untrained, but far from undecided."""
    layers = keras.layers
    wide = keras.initializers.RandomNormal(stddev=4, seed=1)
    ids = keras.Input((32,), dtype="int32")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(4096, 16, embeddings_initializer=wide)(ids))
    return keras.Model(ids, layers.Dense(1, activation="sigmoid", kernel_initializer=wide)(x))


def train(keras: Any, model: Any) -> float:
    """Train; return the accuracy on held-out texts."""
    inputs, classes = texts(2000, 0)
    held, truth = texts(500, 1)
    logits = len(model.inputs) == 2
    given = [inputs, (inputs > 0).astype(np.int32)] if logits else inputs
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    model.fit(given, classes, epochs=2, batch_size=64, verbose=0)
    asked = [held, (held > 0).astype(np.int32)] if logits else held
    return float((model.predict(asked, verbose=0).argmax(-1) == truth).mean())


def main(folder: Path) -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    keras: Any = importlib.import_module("keras")
    keras.utils.set_random_seed(0)
    layers = keras.layers
    recurrent, attentive = lstm(keras, TOKENS), transformer(keras)
    for model in (recurrent, attentive):
        accuracy = train(keras, model)
        assert accuracy > 0.8, accuracy
    recurrent.save(folder / "lstm.keras")
    recurrent.export(folder / "lstm", verbose=False)
    attentive.save(folder / "transformer.keras")
    embedder(keras).save(folder / "embedder.keras")
    judge_of_text(keras).save(folder / "judge.keras")
    any_length = lstm(keras, None)
    any_length.set_weights(recurrent.get_weights())
    any_length.save(folder / "any-length.keras")
    ids = keras.Input((None,), dtype="int32")
    x = layers.LSTM(8)(layers.Embedding(VOCABULARY, 8)(ids))
    keras.Model(ids, layers.Dense(2)(x)).save(folder / "unmasked.keras")
    ids = keras.Input((8,), dtype="int32")
    x = layers.Lambda(lambda x: x * 2.0)(layers.Embedding(10, 4)(ids))
    keras.Model(ids, layers.Dense(2)(layers.Flatten()(x))).save(folder / "lambda.keras")
    text = keras.Input((), dtype="string")
    words = layers.TextVectorization(vocabulary=["a", "b"], output_sequence_length=4)(text)
    x = layers.Flatten()(layers.Embedding(8, 4)(words))
    keras.Model(text, layers.Dense(2)(x)).save(folder / "text.keras")
    save_needy(folder / "needy")
    save_sparing(folder / "sparing")


def save_sparing(folder: Path) -> None:
    """Save a graph of few operators, whose writer must add others, with two variables of one name and 64-bit ids."""
    tf: Any = importlib.import_module("tensorflow")
    module = tf.Module()
    module.table = tf.Variable(tf.random.normal((VOCABULARY, 8)))
    module.head = tf.Variable(tf.random.normal((8, CLASSES)))

    @tf.function(input_signature=[tf.TensorSpec((None, TOKENS), tf.int64)])
    def call(ids: Any) -> Any:
        return {"scores": tf.reduce_sum(tf.gather(module.table, ids), 1) @ module.head}

    tf.saved_model.save(module, str(folder), signatures=call)


def save_needy(folder: Path) -> None:
    """Save a graph that LiteRT alone cannot run: the determinant has no kernel there."""
    tf: Any = importlib.import_module("tensorflow")
    module = tf.Module()
    module.table = tf.Variable(tf.random.normal((20, 4)))

    @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.int32)])
    def call(ids: Any) -> Any:
        squares = tf.reshape(tf.reduce_sum(tf.gather(module.table, ids), 1), (-1, 2, 2))
        return {"scores": tf.linalg.det(squares)[:, None] * [1.0, 2.0]}

    tf.saved_model.save(module, str(folder), signatures=call)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
