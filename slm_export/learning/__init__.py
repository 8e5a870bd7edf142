"""What teaches a model before it is exported: distillation, adaptation to a domain, tuning on reasoning.

One module per matter; what a new way of teaching builds on is this:

    settings    `Training`: steps, batch, length, rate, schedule, seed, as data (pydantic, frozen)
    texts       `read_texts(paths)` -> `Texts`; `split(texts, held_out)` -> training and held-out documents that share
                no run of 13 words
    windows     `windows(documents, tokenizer, length)` -> examples of token ids; `sentences(...)` for encoders
    models      `load(folder)` -> `Model` (module, tokenizer, task); `save(model, folder, dtype)`; `vocabulary(...)`
    trainer     `train(module, examples, loss, training, place, progress, ...)` -> `Curve`
    places      `place(key)`: a folder for unfinished work, found again after a kill, removed when the work is done
    measures    `Interval`: a mean with its confidence interval, by bootstrap over documents
    evaluation  `perplexity(...)`, `divergence(...)`, `likeness(...)`: figures of a model on held-out text
    updating    `update(model, examples, loss, ...)`: as a whole, by low-rank adapters, or on the grid; `settle(...)`
    heads       `with_head(model, task, labels)`: another head on an encoder
    finishing   what lies beside the weights: held-out text, licences, a card
    outcome     `Outcome` -> learning.json and learning.html beside the model

An example is a mapping from names to lists of whole numbers, of which ``input_ids`` is one; a batch is the same as
int64 tensors (examples, longest), padded, with ``attention_mask``. ``labels`` are -100 where nothing is to be learned.
A loss is any callable ``loss(module, batch) -> Tensor``, a scalar. Who teaches writes a loss and the examples, and
takes the rest from here:

    with place({"what": "adapt", ...}) as work:
        model = load(folder)
        curve = train(model.module, examples, causal_loss, training, work, progress, pad_id=model.tokenizer.pad_id)
        save(model, staging.path)
        work.done()

`train` goes on where a killed run of the same key was, to the same bytes.
"""
