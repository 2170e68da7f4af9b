//! The CRI server: the two CRI services over pods that each live in a microVM.
//!
//! [`service`] lists the RPCs; each is one call into the file named after it. What they share is
//! the [`Server`]: configuration, images, network, templates and sandboxes. The binary is
//! `main.rs`; everything else is a library so that tests can reach it.

pub mod config;
pub mod serve;
pub mod service;
pub mod status;
pub mod version;

pub use serve::Server;
