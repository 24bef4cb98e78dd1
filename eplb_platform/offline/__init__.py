"""What runs without a device: loads made and recorded, plans measured on them."""
