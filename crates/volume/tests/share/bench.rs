//! Numbers, for a person: what the share costs over a socket pair.

use crate::fixture::{isolate, volume};
use a3s_box_volume::{Access, Propagation};
use anyhow::Result;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::time::Instant;

const SIZE: usize = 512 << 20;

pub fn run() -> Result<()> {
    isolate()?;
    let (pod, host, guest) = volume()?;
    let chunk = vec![7; 1 << 20];
    let rate = |name: &str, start: Instant| {
        let seconds = start.elapsed().as_secs_f64();
        println!("{name:30} {:8.0} MB/s", SIZE as f64 / 1e6 / seconds);
    };
    let start = Instant::now();
    let mut file = File::create(guest.join("f"))?;
    for _ in 0..SIZE >> 20 {
        file.write_all(&chunk)?;
    }
    drop(file);
    rate("sequential write, 1 MiB", start);

    let mut buffer = chunk;
    for name in ["sequential read, 1 MiB", "again, host cache warm"] {
        let start = Instant::now();
        let mut file = File::open(guest.join("f"))?;
        while file.read(&mut buffer)? > 0 {}
        rate(name, start);
    }
    fs::copy(host.join("f"), pod.host.join("image"))?;
    pod.share.add(
        "images/i",
        &pod.host.join("image"),
        Access::ReadOnly,
        Propagation::HostToContainer,
    )?;
    let mut file = File::open(pod.guest.join("images/i"))?;
    let start = Instant::now();
    while file.read(&mut buffer)? > 0 {}
    rate("sequential read of an image", start);

    let each = |name: &str, count: u32, act: &mut dyn FnMut(u32) -> Result<()>| -> Result<()> {
        let start = Instant::now();
        for number in 0..count {
            act(number)?;
        }
        let micros = start.elapsed().as_secs_f64() * 1e6 / f64::from(count);
        println!("{name:30} {micros:8.1} us");
        Ok(())
    };
    let file = File::open(guest.join("f"))?;
    each("random read, 4 KiB", 20_000, &mut |number| {
        let place = u64::from(number.wrapping_mul(2_654_435_761)) % (SIZE as u64 / 4096) * 4096;
        Ok(file.read_exact_at(&mut buffer[..4096], place)?)
    })?;
    let file = File::options().write(true).open(guest.join("f"))?;
    each("write, 4 KiB", 20_000, &mut |number| {
        Ok(file.write_all_at(&buffer[..4096], u64::from(number) << 12)?)
    })?;
    each("stat", 20_000, &mut |_| {
        fs::metadata(guest.join("f"))?;
        Ok(())
    })?;
    each("create, write, close", 5_000, &mut |number| {
        Ok(fs::write(guest.join(format!("n{number}")), b"x")?)
    })?;
    each("open, read, close", 5_000, &mut |number| {
        fs::read(guest.join(format!("n{number}")))?;
        Ok(())
    })?;
    each("list 5000 entries", 5, &mut |_| {
        for entry in fs::read_dir(&guest)? {
            entry?.metadata()?;
        }
        Ok(())
    })?;
    for (name, process) in [("server", &pod.server), ("pump", &pod.pump)] {
        let status = fs::read_to_string(format!("/proc/{}/status", process.0.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS"));
        println!("{name}: {}", line.unwrap_or_default());
    }
    Ok(())
}
