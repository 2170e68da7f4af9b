//! The agent's few words: lines on the guest's console through /dev/kmsg, or on standard error
//! outside a guest. They end in the shim's console tail, where every error about the guest quotes
//! them.

use std::{fmt, fs::File, io::Write, sync::OnceLock};

static KMSG: OnceLock<File> = OnceLock::new();

/// From now on lines go to the kernel's log, and so to the console.
pub fn to_kernel() -> std::io::Result<()> {
    let file = File::options().write(true).open("/dev/kmsg")?;
    // A second call keeps the first file; both are the same device.
    drop(KMSG.set(file));
    Ok(())
}

/// Something worth a line in a healthy boot.
pub fn info(text: fmt::Arguments<'_>) {
    write(6, text);
}

/// Something is wrong.
pub fn error(text: fmt::Arguments<'_>) {
    write(3, text);
}

fn write(level: u8, text: fmt::Arguments<'_>) {
    // One write is one record; nobody is left to tell when it fails.
    let written = match KMSG.get() {
        Some(mut kmsg) => kmsg.write_all(format!("<{level}>a3s-box-agent: {text}\n").as_bytes()),
        None => std::io::stderr().write_all(format!("a3s-box-agent: {text}\n").as_bytes()),
    };
    drop(written);
}
