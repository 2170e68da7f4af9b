//! The guest's scratch disk: a sparse file with an ext4 of its own.

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use std::{fs::File, io, os::unix::fs::FileExt, path::Path, process::Command};

/// Makes `path` an empty ext4 of `bytes`. It has neither journal nor checksums: it lives as long as its
/// pod, and is never recovered.
///
/// # Errors
/// The file's, or what mkfs.ext4 printed.
pub fn format(path: &Path, bytes: u64) -> io::Result<File> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    file.set_len(bytes)?;
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode,^metadata_csum"])
        .args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"])
        .arg(path)
        .output()
        .map_err(|err| {
            io::Error::new(err.kind(), format!("mkfs.ext4 (package e2fsprogs): {err}"))
        })?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("mkfs.ext4: {}", why.trim())));
    }
    Ok(file)
}

/// Copies `from` to the new file `to`, sharing blocks where the file system can, and leaving holes
/// holes where it cannot.
///
/// # Errors
/// The files'.
pub fn copy_sparse(from: &File, to: &Path) -> io::Result<File> {
    let target = File::options().read(true).write(true).create_new(true).open(to)?;
    if ioctl_ficlone(&target, from).is_ok() {
        return Ok(target);
    }
    let length = from.metadata()?.len();
    target.set_len(length)?;
    let mut offset = 0;
    while let Some((start, end)) = next_data(from, offset)? {
        copy_range(from, &target, start, end)?;
        offset = end;
    }
    Ok(target)
}

/// The next stretch of `file` at or after `offset` that is not a hole.
pub(crate) fn next_data(file: &File, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match seek(file, SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(err) => return Err(err.into()),
    };
    Ok(Some((start, seek(file, SeekFrom::Hole(start))?)))
}

/// Copies the bytes from `start` to `end`, each to its own place.
pub(crate) fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = start;
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        from.read_exact_at(&mut buffer[..want], at)?;
        to.write_all_at(&buffer[..want], at)?;
        at += want as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_has_the_same_bytes_and_the_same_holes() {
        let folder = tempfile::tempdir().unwrap();
        let from = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(folder.path().join("from"))
            .unwrap();
        from.set_len(1 << 30).unwrap();
        from.write_all_at(b"in the middle", 500 << 20).unwrap();
        let copy = copy_sparse(&from, &folder.path().join("to")).unwrap();
        let mut text = [0; 13];
        copy.read_exact_at(&mut text, 500 << 20).unwrap();
        assert_eq!(&text, b"in the middle");
        let meta = copy.metadata().unwrap();
        assert_eq!(meta.len(), 1 << 30);
        assert!(meta.blocks() * 512 < 1 << 20, "holes were filled: {} blocks", meta.blocks());
    }
}
