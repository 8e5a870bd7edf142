"""What MIL's operators mean, by kind; `registry` finds them."""
