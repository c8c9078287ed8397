//! Unpacks layers inside a networkless tree worker. No async, no network, no features.
#![forbid(unsafe_code)]
