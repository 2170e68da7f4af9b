//! Damaged SPDY: `cargo run --release --example fuzz -- COUNT [SEED]`. The same seed does the same again.

#[path = "../tests/common/fuzz.rs"]
mod fuzz;

use anyhow::Context;

fn main() -> anyhow::Result<()> {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse());
    let count = numbers.next().context("how many?")??;
    let seed = numbers.next().transpose()?.unwrap_or_else(rand::random);
    println!("seed {seed}");
    println!("{:?}", fuzz::run(count, seed));
    Ok(())
}
