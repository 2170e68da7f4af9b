//! The host's half: what the pod may see (`share`), and the process that serves it (`serve`).

mod attributes;
mod confine;
mod contents;
mod handles;
mod init;
mod message;
mod metadata;
mod names;
mod nodes;
mod serve;
mod share;
mod worker;

pub use init::handshake;
pub use serve::serve;
pub use share::{Access, Propagation, Share};

use std::io;
use std::path::PathBuf;

/// Why the share could not be made, changed or served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A mount or a mount point.
    #[error("{step} {}", path.display())]
    Mount {
        /// What was being done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A name in the share that is absolute, empty or has dots in it.
    #[error("{0:?} is no name in the share")]
    Name(String),
    /// The server could not shut itself in.
    #[error("confine the volume server: {step}")]
    Confine {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The system call filter could not be made or installed.
    #[error("confine the volume server: seccomp")]
    Seccomp(#[from] libseccomp::error::SeccompError),
    /// The stream to the guest.
    #[error("exchange messages with the guest")]
    Stream(#[source] io::Error),
    /// The guest sent something from which the next message cannot be found.
    #[error("the guest broke the protocol: {0}")]
    Protocol(&'static str),
}

/// Result of this half.
pub type Result<T> = std::result::Result<T, Error>;
