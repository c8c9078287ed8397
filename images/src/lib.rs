//! Environment templates and image references: hostile input in, a prepared directory tree out.
#![forbid(unsafe_code)]
