"""What two or more stages share: configuration, the on-disk stores, the model, the SAE itself."""
