"""What several rooms of tests share: tiny models, quantizers, caches, studies, kernel cases."""
