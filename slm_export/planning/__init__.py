"""What an export would cost and give, told before it is made: from configuration and headers, without torch."""
