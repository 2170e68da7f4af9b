//! What can go wrong with an image, and what that means to a caller.

use crate::Digest;
use a3s_box_store::StoreError;
use std::{fmt, io, path::PathBuf, sync::Arc, time::Duration};

/// An operation on an image failed.
///
/// Cheap to clone: everyone who waited for the same layer gets the same error.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    /// The text names no image.
    #[error("{reference:?} is no image name: {why}")]
    Reference {
        /// As it was given.
        reference: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No image of this name or id is on the node.
    #[error("image {0} is not on this node")]
    NotHere(String),
    /// The credentials given with the pull make no sense.
    #[error("credentials for {image}: {why}")]
    Credentials {
        /// The image.
        image: String,
        /// What is wrong with them.
        why: &'static str,
    },
    /// The node's registry configuration cannot be used.
    #[error("registry configuration {path}: {why}")]
    RegistryConfig {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// No registry gave what was asked for.
    #[error("pull {image}: {step}")]
    Registry {
        /// The image.
        image: String,
        /// What was asked for.
        step: String,
        /// What each registry said.
        source: RegistryError,
    },
    /// The registry's documents describe nothing this program can run.
    #[error("pull {image}: {what} is no usable container image: {why}")]
    NotAnImage {
        /// The image.
        image: String,
        /// Which document.
        what: String,
        /// Why not.
        why: String,
    },
    /// The image is not made for this machine.
    #[error("pull {image}: no image for {wanted}, only for {}", offered.join(", "))]
    Platform {
        /// The image.
        image: String,
        /// This machine's platform.
        wanted: String,
        /// What there is.
        offered: Vec<String>,
    },
    /// Content is not what its digest says, or not an archive.
    #[error("pull {image}: {what} is damaged: {why}")]
    Corrupt {
        /// The image.
        image: String,
        /// Which content.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The EROFS tools failed.
    #[error("pull {image}: pack layer {layer} as EROFS: {why}")]
    Erofs {
        /// The image.
        image: String,
        /// The layer's diff id.
        layer: Digest,
        /// What the tool said.
        why: String,
    },
    /// The node's file system refused.
    #[error("{step} {path}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// A record could not be written, read or removed.
    #[error("image records")]
    Store(#[source] Arc<StoreError>),
    /// Another process owns the image folder.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// The work ended because the program is ending.
    #[error("pull {image}: the program is ending")]
    Cancelled {
        /// The image.
        image: String,
    },
}

/// What an error means to the caller; gRPC has a code for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// There is no such image.
    NotFound,
    /// The registry wants (other) credentials.
    Unauthenticated,
    /// The registry knows who asks and refuses.
    PermissionDenied,
    /// A registry cannot be reached or is not well; later it may be.
    Unavailable,
    /// A registry did not answer in time.
    DeadlineExceeded,
    /// The request makes no sense.
    InvalidArgument,
    /// The image, or the node's configuration, must change first.
    FailedPrecondition,
    /// Bytes are not what their digest says.
    DataLoss,
    /// The disk is full.
    ResourceExhausted,
    /// The program is ending.
    Cancelled,
    /// The node is at fault.
    Internal,
}

impl ImageError {
    /// What this means to the caller.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Reference { .. } | Self::Credentials { .. } => Kind::InvalidArgument,
            Self::NotHere(_) => Kind::NotFound,
            Self::RegistryConfig { .. }
            | Self::NotAnImage { .. }
            | Self::Platform { .. }
            | Self::InUse(_) => Kind::FailedPrecondition,
            Self::Registry { source, .. } => source.kind(),
            Self::Corrupt { .. } => Kind::DataLoss,
            Self::Erofs { .. } => Kind::Internal,
            Self::Io { source, .. } => io_kind(source),
            Self::Store(source) => match &**source {
                StoreError::Io { source, .. } => io_kind(source),
                StoreError::Name(_) | StoreError::Encode(..) => Kind::Internal,
            },
            Self::Cancelled { .. } => Kind::Cancelled,
        }
    }

    pub(crate) fn io(step: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { step, path: path.into(), source: Arc::new(source) }
    }
}

impl From<StoreError> for ImageError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

fn io_kind(error: &io::Error) -> Kind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::ResourceExhausted,
        _ => Kind::Internal,
    }
}

/// What each registry said, in the order they were asked; the image's own registry comes last.
#[derive(Debug, Clone)]
pub struct RegistryError {
    /// One per registry that was asked: its last failure.
    pub failures: Vec<HostFailure>,
}

impl RegistryError {
    /// The word of the image's own registry; where it cannot be reached, of the one before.
    pub fn kind(&self) -> Kind {
        let definite = |failure: &&HostFailure| !failure.transient;
        self.failures
            .last()
            .filter(definite)
            .or_else(|| self.failures.iter().rev().find(definite))
            .or_else(|| self.failures.last())
            .map_or(Kind::Unavailable, |failure| failure.kind)
    }
}

impl fmt::Display for RegistryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.failures.is_empty() {
            return f.write_str("no registry is configured that may be asked");
        }
        for (index, failure) in self.failures.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{failure}")?;
        }
        Ok(())
    }
}

impl std::error::Error for RegistryError {}

/// One registry's failure.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{host}: {why}")]
pub struct HostFailure {
    /// The registry's address.
    pub host: String,
    /// What went wrong, with its causes.
    pub why: String,
    /// What it means.
    pub kind: Kind,
    /// Trying again may help.
    pub transient: bool,
    /// When to try again, if the registry said so.
    pub retry_after: Option<Duration>,
}

/// An error with its causes on one line: for texts that are put together from several errors.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(kind: Kind, transient: bool) -> HostFailure {
        HostFailure { host: "x".into(), why: "y".into(), kind, transient, retry_after: None }
    }

    #[test]
    fn the_images_own_registry_decides_unless_it_cannot_be_reached() {
        let mirror = failure(Kind::NotFound, false);
        let denied = failure(Kind::PermissionDenied, false);
        let down = failure(Kind::Unavailable, true);
        let kind = |failures: &[&HostFailure]| {
            RegistryError { failures: failures.iter().map(|&failure| failure.clone()).collect() }
                .kind()
        };
        assert_eq!(kind(&[&mirror, &denied]), Kind::PermissionDenied);
        assert_eq!(kind(&[&mirror, &down]), Kind::NotFound);
        assert_eq!(kind(&[&down, &down]), Kind::Unavailable);
        assert_eq!(kind(&[]), Kind::Unavailable);
    }

    #[test]
    fn a_full_disk_is_told_from_other_faults() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        assert_eq!(ImageError::io("write", "/x", full).kind(), Kind::ResourceExhausted);
        let other = io::Error::from(io::ErrorKind::NotFound);
        assert_eq!(ImageError::io("write", "/x", other).kind(), Kind::Internal);
    }
}
