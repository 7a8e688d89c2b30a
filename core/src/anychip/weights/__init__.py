"""How checkpoint tensors reach the layers that want them: the register, the files, the matrices on their way."""
