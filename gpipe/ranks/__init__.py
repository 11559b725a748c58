"""A pipeline whose stages are the ranks of a torch.distributed world."""
