"""What a package says of itself beyond the format's own description: keys of its user-defined metadata.

Lists are JSON. Apps read them too: the Swift package of the iOS target, for one.
"""

TASK = "slm_export.task"
CONTEXT = "slm_export.context"
"""Most tokens."""
PREFILL = "slm_export.prefill"
"""Most tokens of one call, as our sessions and apps divide a prompt."""
STOP_IDS = "slm_export.stop_ids"
BOS_ID = "slm_export.bos_id"
"""Only where the tokenizer does not put the opening token there by itself, but the model has one."""
LENGTHS = "slm_export.lengths"
"""Lengths of an encoder's input; what is shorter is padded to the next."""
LABELS = "slm_export.labels"
"""Names of the classes, in order."""
TOKENIZER = "slm_export.tokenizer_sha256"
"""Hash of the bundle's tokenizer folder."""
WEIGHTS = "slm_export.weights"
"""Names of the program's constants -> names of the checkpoint's weights."""
