//! The host's half: what the pod may see (`share`), and the process that serves it (`serve`).

mod attributes;
mod confine;
mod contents;
mod guest_mount;
mod handles;
mod held;
mod init;
mod message;
mod metadata;
mod names;
mod nodes;
mod orders;
mod serve;
mod share;
mod updates;
mod worker;

pub use guest_mount::{Place, attach, detach};
pub use init::{answer, handshake};
pub use orders::{Orders, Owner};
pub use serve::{serve, serve_mount};
pub use share::{Access, Propagation, Share, Source};

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
    /// An order of the share's owner.
    #[error("{step} {name:?}")]
    Order {
        /// What was ordered.
        step: &'static str,
        /// A path in the share.
        name: String,
        /// The server's answer, or the stream's.
        source: io::Error,
    },
    /// The stream to the guest.
    #[error("exchange messages with the guest")]
    Stream(#[source] io::Error),
    /// The guest sent something from which the next message cannot be found.
    #[error("the guest broke the protocol: {0}")]
    Protocol(&'static str),
}

/// Result of this half.
pub type Result<T> = std::result::Result<T, Error>;
