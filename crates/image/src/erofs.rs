//! Packing a folder as an EROFS file system, with `mkfs.erofs` of erofs-utils.

use std::{io, path::Path, process::Stdio};
use tokio::process::Command;

const MKFS: &str = "mkfs.erofs";
/// A random one would make every packing differ.
const NO_UUID: &str = "00000000-0000-0000-0000-000000000000";

/// Packs `folder` into a new file. Not compressed, and data apart from inodes, so that the guest can map the
/// file's pages as they are. The same folder gives the same bytes.
///
/// # Errors
/// What `mkfs.erofs` said last, or why it could not be run.
pub async fn pack(folder: &Path, file: &Path) -> Result<(), String> {
    let output = Command::new(MKFS)
        .args(["--quiet", "-E", "noinline_data", "-U", NO_UUID])
        .arg(file)
        .arg(folder)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await;
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said
                .lines()
                .rev()
                .find(|line| !line.trim().is_empty())
                .unwrap_or("it said nothing");
            Err(format!("{MKFS}: {}: {last}", output.status))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(format!("{MKFS} is not installed (package erofs-utils)"))
        }
        Err(error) => Err(format!("{MKFS}: {error}")),
    }
}
