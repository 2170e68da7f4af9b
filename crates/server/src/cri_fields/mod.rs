//! A statement for every field of every CRI request: honoured, refused, or without meaning here.
//!
//! The statements are found, not claimed. Each field is given values that are not its default, in
//! requests that are otherwise good, and the server over a fake host is asked. Where the answer, an order
//! to the shim, what CNI is told or a state is another one than without the value, that is its effect; an
//! error is its refusal. A field with neither has to have a note with the reason, or it fails the test,
//! as does a note that is not what is found. docs/cri-fields.md is what was found;
//! `WRITE=1 cargo test -p a3s-box-cri cri_fields` writes it.

mod calls;
mod notes;
mod page;
mod place;
mod requests;
mod trial;
mod values;

use std::path::Path;

#[tokio::test(flavor = "multi_thread")]
async fn every_field_of_every_request_has_its_effect_its_refusal_or_a_reason() {
    let (text, problems) = page::page().await;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cri-fields.md");
    if std::env::var_os("WRITE").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    let differ = text.lines().zip(written.lines()).find(|(found, written)| found != written);
    assert!(
        text == written,
        "docs/cri-fields.md is not what was found; first difference: {differ:?}. \
         Write it with WRITE=1 cargo test -p a3s-box-cri cri_fields"
    );
}
