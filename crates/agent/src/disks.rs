//! Block devices of the node, as the guest sees them once they are plugged in.

use crate::{
    config::Boundary,
    error::{Error, Step},
};
use a3s_box_api::agent::v1 as api;
use rustix::fs::{major, minor};
use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// One folder for each unit, named HOST:CHANNEL:TARGET:UNIT (kernel documentation, scsi/scsi_mid_low_api).
const UNITS: &str = "/sys/bus/scsi/devices";
/// A guest finds a disk within half a second translated; a busy host may need much longer.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);

/// Waits until the disk is there and can be opened.
pub async fn find(boundary: Boundary, target: u32) -> Result<api::FindDiskResponse, Error> {
    if boundary != Boundary::Guest {
        return Err(Error::Unsupported("a plugged disk outside a guest".to_owned()));
    }
    let what = || format!("find disk {target}");
    let since = Instant::now();
    loop {
        if let Some(node) = node(Path::new(UNITS), target).step(what())?
            && fs::File::open(&node).is_ok()
        {
            let number = fs::metadata(&node).step(what())?.rdev();
            return Ok(api::FindDiskResponse { major: major(number), minor: minor(number) });
        }
        if since.elapsed() > PATIENCE {
            return Err(Error::NotNow(format!("{}: it did not appear", what())));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The disk's node in /dev, which devtmpfs makes.
fn node(units: &Path, target: u32) -> io::Result<Option<PathBuf>> {
    let unit = format!(":0:{target}:0");
    for entry in entries(units)? {
        let is_wanted = entry
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().ends_with(unit.as_bytes()));
        if is_wanted && let Some(disk) = entries(&entry.join("block"))?.pop() {
            return Ok(disk.file_name().map(|name| Path::new("/dev").join(name)));
        }
    }
    Ok(None)
}

/// Nothing in a folder that is not there yet.
fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_known_by_its_target_alone() {
        let units = tempfile::tempdir().unwrap();
        for (unit, disk) in [("0:0:1:0", "sda"), ("0:0:11:0", "sdb"), ("target0:0:3", "x")] {
            fs::create_dir_all(units.path().join(unit).join("block").join(disk)).unwrap();
        }
        let found = |target| node(units.path(), target).unwrap();
        assert_eq!(found(1), Some("/dev/sda".into()));
        assert_eq!(found(11), Some("/dev/sdb".into()));
        assert_eq!(found(3), None);
        assert_eq!(node(&units.path().join("none"), 1).unwrap(), None);
    }
}
