"""What a model takes of a device, before anything is downloaded or built: memory, time, and what would make it fit."""
