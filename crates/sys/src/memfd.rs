//! Sealed memory files.

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::{fs::File, io};

/// An empty memory file that can be sealed later.
///
/// # Errors
/// What memfd_create said.
pub fn create(name: &str) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(File::from(memfd_create(name, flags)?))
}

/// Makes the file's content and size final. Private writable mappings of it stay possible; holes
/// punched through them (a balloon's, a free-page report's) are refused.
///
/// # Errors
/// EBUSY while a shared writable mapping exists.
pub fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    Ok(fcntl_add_seals(file, seals)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_sealed_file_can_be_read_but_not_changed() {
        let file = create("test").unwrap();
        file.write_all_at(b"template", 0).unwrap();
        seal(&file).unwrap();
        assert!(file.write_all_at(b"x", 0).is_err());
        assert!(file.set_len(0).is_err());
        let mut text = [0; 8];
        file.read_exact_at(&mut text, 0).unwrap();
        assert_eq!(&text, b"template");
    }
}
