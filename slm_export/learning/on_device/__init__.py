"""Training that goes on in the app: one program that takes a step, for what of a model may still learn there.

step        the model as it ships, frozen on its grid, with a low-rank adapter or its head to be learned, and the loss
lowering    forward and backward in one ExecuTorch program, for the runtime's training extension
proof       the runtime's loss, gradients and steps beside torch's autograd on the same batches
build       the folder that an app takes: program, what it expects, the adapter to begin with
"""
