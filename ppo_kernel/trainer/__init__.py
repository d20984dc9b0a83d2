"""What a practitioner imports: trainer, model folders, rewards and supervised stages."""
