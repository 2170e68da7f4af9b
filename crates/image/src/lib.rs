//! Images: from a registry's bytes to read-only EROFS layers on disk.
//!
//! ```text
//! ROOT/image/
//!   layers/HEX.erofs      one file system per layer, named by the layer's diff id
//!   layers/HEX.json       what its folders look like, see `parents.rs`
//!   records/HEX/          one record per image, named by the image id: see `records.rs`
//!   temporary/            what is being made; emptied at open
//!   lock                  held by the one process that owns this folder
//! ```
//!
//! A pull goes: reference -> hosts -> manifest -> configuration -> layers -> record. A layer's bytes are
//! verified, decompressed and unpacked while they arrive, then packed as EROFS; the archive itself is never
//! stored, because nothing needs it again. The record is written last, so an image is there as a whole or
//! not at all. Layers that no record names are removed at open and after a removal; those of a pull that
//! failed stay until then, so that the next try finds them.
//!
//! Layers are stacked by the guest's overlay, so deletions are overlay's: character devices 0:0 and
//! `trusted.overlay.opaque`.
//!
//! Not here: CRI types (the server's), mounting (the shim shares the files, the guest mounts them).

mod auth;
mod digest;
mod download;
mod entry;
mod erofs;
mod error;
mod hosts;
mod images;
mod joins;
mod layer;
mod manifest;
mod parents;
mod path;
mod pull;
mod records;
mod reference;
mod registry;
mod unpack;

pub use auth::Auth;
pub use digest::Digest;
pub use erofs::pack;
pub use error::{HostFailure, ImageError, Kind, RegistryError};
pub use images::{Image, Images, Options, Usage};
pub use reference::Reference;
pub use registry::Limits;
