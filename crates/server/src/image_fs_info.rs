//! ImageFsInfo.

use crate::{
    Server,
    images::{ImageRpcError, Usage},
    sandbox::now,
};
use a3s_box_api::cri;
use std::{fs, io, os::unix::fs::MetadataExt, path::Path, sync::Arc};
use tonic::Code;

/// What images, and what containers wrote, take up. Both lie in the root folder, and both name it:
/// kubelet takes different names for different file systems.
pub async fn image_fs_info(
    server: Arc<Server>,
    _: cri::ImageFsInfoRequest,
) -> Result<cri::ImageFsInfoResponse, ImageRpcError> {
    let images = server.images.usage().await?;
    let root = server.config.root.clone();
    let sandboxes = root.join("sandboxes");
    let measured = tokio::task::spawn_blocking(move || usage(&sandboxes)).await;
    let containers = measured.map_err(io::Error::other).and_then(|usage| usage);
    let containers = containers.map_err(|error| ImageRpcError::Store {
        step: "measure what containers wrote".to_owned(),
        code: Code::Internal,
        source: error.into(),
    })?;
    let filesystem = |usage: Usage| cri::FilesystemUsage {
        timestamp: now(),
        fs_id: Some(cri::FilesystemIdentifier { mountpoint: root.display().to_string() }),
        used_bytes: Some(cri::UInt64Value { value: usage.bytes }),
        inodes_used: Some(cri::UInt64Value { value: usage.inodes }),
    };
    Ok(cri::ImageFsInfoResponse {
        image_filesystems: vec![filesystem(images)],
        container_filesystems: vec![filesystem(containers)],
    })
}

/// Blocks and inodes below a folder. What goes away meanwhile counts for nothing.
fn usage(folder: &Path) -> io::Result<Usage> {
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let mut sum = Usage { bytes: 0, inodes: 0 };
    let entries = match fs::read_dir(folder) {
        Err(error) if gone(&error) => return Ok(sum),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let data = match entry.metadata() {
            Err(error) if gone(&error) => continue,
            data => data?,
        };
        sum.bytes += data.blocks() * 512;
        sum.inodes += 1;
        if data.is_dir() {
            let below = usage(&entry.path())?;
            sum.bytes += below.bytes;
            sum.inodes += below.inodes;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_in_a_disk_take_up_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let sandbox = folder.path().join("a");
        fs::create_dir(&sandbox).unwrap();
        fs::File::create(sandbox.join("disk.ext4")).unwrap().set_len(1 << 40).unwrap();
        fs::write(sandbox.join("record"), vec![1; 8192]).unwrap();
        let usage = usage(folder.path()).unwrap();
        assert_eq!(usage.inodes, 3);
        assert!((8192..1 << 20).contains(&usage.bytes), "{usage:?}");
        assert_eq!(super::usage(&sandbox.join("none")).unwrap().inodes, 0);
    }
}
