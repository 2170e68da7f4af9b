//! Pulls from registries, honest and not. Packing layers takes `mkfs.erofs`.

#![allow(clippy::unwrap_used)]

mod fake;

use a3s_box_image::{Auth, Digest, ImageError, Images, Kind};
use fake::{
    Answer, Content, DOCKER_GZIP, DOCKER_LIST, DOCKER_MANIFEST, GZIP, OCI_INDEX, OCI_MANIFEST,
    PLAIN, Registry, ZSTD, store, tar,
};
use serde_json::json;
use std::{error::Error, fs, path::Path, sync::Arc};

fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Asks for an image that cannot be had: what is said, and that nothing of it is left.
async fn refused(images: &Arc<Images>, folder: &Path, name: &str) -> (Kind, String) {
    let error = images.pull(name, None).await.map(|image| image.id).unwrap_err();
    assert!(images.list().is_empty(), "{name} is there after all");
    let left: Vec<_> = fs::read_dir(folder.join("temporary")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(chain(&error).contains(name), "{name} is not named: {}", chain(&error));
    (error.kind(), chain(&error))
}

async fn refused_once(registry: &Registry, tag: &str) -> (Kind, String) {
    let folder = tempfile::tempdir().unwrap();
    refused(&store(folder.path(), None), folder.path(), &registry.image(tag)).await
}

fn a_layer(path: &str) -> bool {
    path == format!("x/blobs/{}", Digest::of(&tar(0)))
}

/// An honest image of one plain layer, `x:1`.
fn content() -> Content {
    let mut content = Content::default();
    content.image("1", OCI_MANIFEST, "amd64", &[PLAIN]);
    content
}

#[tokio::test]
async fn images_of_oci_and_docker_come_in_every_packing_and_by_platform() {
    let mut content = Content::default();
    let oci = content.image("oci", OCI_MANIFEST, "amd64", &[GZIP, ZSTD, PLAIN]);
    let other = content.image("other", OCI_MANIFEST, "arm64", &[PLAIN]);
    content.index("index", OCI_INDEX, &[("arm64", other), ("amd64", oci)]);
    let docker = content.image("docker", DOCKER_MANIFEST, "amd64", &[DOCKER_GZIP, DOCKER_GZIP]);
    let list = content.index("list", DOCKER_LIST, &[("amd64", docker)]);
    let registry = Registry::honest(content).await;
    let folder = tempfile::tempdir().unwrap();
    let images = store(folder.path(), None);
    let by_index = images.pull(&registry.image("index"), None).await.unwrap();
    let by_tag = images.pull(&registry.image("oci"), None).await.unwrap();
    assert_eq!(by_index.id, by_tag.id);
    assert_eq!(by_index.layers.len(), 3);
    let by_list = images.pull(&registry.image("list"), None).await.unwrap();
    let by_digest = images.pull(&registry.image(&list.to_string()), None).await.unwrap();
    assert_eq!(by_list.id, by_digest.id);
    assert_eq!(by_digest.repo_digests, [registry.image(&list.to_string())]);
    // The layers of both are the same archives, and are there once.
    assert_eq!(by_list.layers, by_index.layers[..2]);
    assert_eq!(images.list().len(), 2);
}

#[tokio::test]
async fn an_unknown_image_is_said_in_the_registrys_words() {
    let registry = Registry::honest(content()).await;
    let (kind, why) = refused_once(&registry, "2").await;
    assert_eq!(kind, Kind::NotFound);
    assert!(why.contains("resolve tag 2") && why.contains("404"), "{why}");
    let (kind, why) = refused_once(&registry, &format!("sha256:{}", "0".repeat(64))).await;
    assert_eq!(kind, Kind::NotFound);
    assert!(why.contains("never heard of it"), "{why}");
}

#[tokio::test]
async fn a_document_that_is_not_its_digest_is_refused() {
    let mut content = content();
    let digest = content.image("1", OCI_MANIFEST, "amd64", &[PLAIN]).to_string();
    let registry = Registry::lying(content, |path, _, mut answer| {
        if path.starts_with("x/manifests/sha256:") {
            answer.body.push(b' ');
        }
        answer
    })
    .await;
    let (kind, why) = refused_once(&registry, "1").await;
    assert_eq!(kind, Kind::DataLoss);
    assert!(why.contains(&format!("sent other bytes than {digest}")), "{why}");
}

#[tokio::test]
async fn a_layer_that_is_not_its_digest_is_refused() {
    let registry = Registry::lying(content(), |path, _, mut answer| {
        if a_layer(path) {
            answer.body[600] ^= 1;
        }
        answer
    })
    .await;
    let (kind, why) = refused_once(&registry, "1").await;
    assert_eq!(kind, Kind::DataLoss);
    assert!(why.contains(&format!("sent other bytes than {}", Digest::of(&tar(0)))), "{why}");
}

#[tokio::test]
async fn a_truncated_layer_is_refused_whether_its_length_was_true_or_not() {
    for honest_about_it in [false, true] {
        let registry = Registry::lying(content(), move |path, headers, mut answer| {
            if a_layer(path) {
                let from = headers.contains_key("range");
                if honest_about_it {
                    answer.body.truncate(1000);
                } else {
                    answer.breaks_after = Some(if from { 0 } else { 1000 });
                }
            }
            answer
        })
        .await;
        let (kind, why) = refused_once(&registry, "1").await;
        if honest_about_it {
            assert_eq!(kind, Kind::DataLoss);
            assert!(why.contains(&format!("has 1000 bytes instead of {}", tar(0).len())), "{why}");
        } else {
            assert_eq!(kind, Kind::Unavailable);
            assert!(why.contains(&format!("layer {}", Digest::of(&tar(0)))), "{why}");
        }
    }
}

#[tokio::test]
async fn a_layer_that_breaks_off_goes_on_where_it_did() {
    let registry = Registry::lying(content(), |path, headers, mut answer| {
        if !a_layer(path) {
            return answer;
        }
        let Some(range) = headers.get("range") else {
            answer.breaks_after = Some(7000);
            return answer;
        };
        let from: usize =
            range.to_str().unwrap()["bytes=".len()..].trim_end_matches('-').parse().unwrap();
        answer.body.drain(..from);
        answer.status = 206;
        answer.with("content-range", format!("bytes {from}-1/2"))
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let images = store(folder.path(), None);
    images.pull(&registry.image("1"), None).await.unwrap();
}

#[tokio::test]
async fn a_layer_that_unpacks_to_something_else_is_refused() {
    let mut content = Content::default();
    let size = tar(0).len();
    let digest = content.blob(tar(0)).to_string();
    let layer = json!({"mediaType": PLAIN, "digest": digest, "size": size});
    content.manifest(
        "1",
        OCI_MANIFEST,
        "amd64",
        std::slice::from_ref(&layer),
        &[Digest::of(b"").to_string()],
    );
    content.manifest("2", OCI_MANIFEST, "amd64", &[layer], &[]);
    let encrypted = json!({"mediaType": "application/x", "digest": digest, "size": size});
    let diff_id = Digest::of(&tar(0)).to_string();
    content.manifest("3", OCI_MANIFEST, "amd64", &[encrypted], std::slice::from_ref(&diff_id));
    let not_gzip = json!({"mediaType": GZIP, "digest": digest, "size": size});
    content.manifest("4", OCI_MANIFEST, "amd64", &[not_gzip], &[diff_id]);
    let registry = Registry::honest(content).await;
    for (tag, kind, word) in [
        ("1", Kind::DataLoss, "it unpacks to"),
        ("2", Kind::FailedPrecondition, "it has 0 layers, the manifest 1"),
        ("3", Kind::FailedPrecondition, "its type is \"application/x\""),
        ("4", Kind::DataLoss, "is damaged"),
    ] {
        let (found, why) = refused_once(&registry, tag).await;
        assert_eq!(found, kind, "{why}");
        assert!(why.contains(word), "{why}");
    }
}

#[tokio::test]
async fn an_image_for_another_machine_is_refused_with_what_there_is() {
    let mut content = Content::default();
    let other = content.image("1", OCI_MANIFEST, "s390x", &[PLAIN]);
    content.index("2", OCI_INDEX, &[("s390x", other.clone()), ("arm64", other)]);
    let registry = Registry::honest(content).await;
    for (tag, offered) in [("1", "linux/s390x"), ("2", "linux/s390x, linux/arm64")] {
        let (kind, why) = refused_once(&registry, tag).await;
        assert_eq!(kind, Kind::FailedPrecondition);
        assert!(why.contains(&format!("no image for linux/amd64, only for {offered}")), "{why}");
    }
}

#[tokio::test]
async fn what_is_no_registry_is_said_to_be_none() {
    let folder = tempfile::tempdir().unwrap();
    let images = store(folder.path(), None);
    let (kind, why) = refused(&images, folder.path(), "127.0.0.1:1/x:1").await;
    assert_eq!(kind, Kind::Unavailable);
    assert!(why.contains("127.0.0.1:1") && why.contains("refused"), "{why}");
    let (kind, why) = refused(&images, folder.path(), "no-such-host.invalid/x:1").await;
    assert_eq!(kind, Kind::Unavailable);
    assert!(why.contains("no-such-host.invalid: "), "{why}");

    let page = Registry::lying(content(), |_, _, answer| Answer {
        body: b"<html>Welcome!".to_vec(),
        headers: vec![],
        ..answer
    })
    .await;
    let (kind, why) = refused_once(&page, "1").await;
    assert_eq!(kind, Kind::FailedPrecondition);
    assert!(why.contains("no usable container image"), "{why}");

    let mute = Registry::lying(content(), |_, _, answer| Answer { silent: true, ..answer }).await;
    let (kind, why) = refused_once(&mute, "1").await;
    assert_eq!(kind, Kind::DeadlineExceeded);
    assert!(why.contains("no answer in time"), "{why}");

    let endless = Registry::lying(content(), |path, _, answer| match path.contains("manifests") {
        true => Answer { body: vec![b' '; 9 << 20], headers: vec![], ..answer },
        false => answer,
    })
    .await;
    let (kind, why) = refused_once(&endless, "1").await;
    assert_eq!(kind, Kind::FailedPrecondition);
    assert!(why.contains("sent more than"), "{why}");
}

#[tokio::test]
async fn a_registry_that_is_not_well_is_asked_again() {
    let failed = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let registry = Registry::lying(content(), move |_, _, answer| {
        match failed.swap(true, std::sync::atomic::Ordering::Relaxed) {
            false => Answer::status(503),
            true => answer,
        }
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    store(folder.path(), None).pull(&registry.image("1"), None).await.unwrap();
}

/// Lets in who shows this `Authorization`; others are told where to get one.
fn guarded(
    wanted: &'static str,
    challenge: String,
) -> impl Fn(&str, &hyper::HeaderMap, Answer) -> Answer {
    move |path, headers, answer| {
        if path == "/token" {
            return match headers.get("authorization").map(|value| value.to_str().unwrap()) {
                // ann:secret
                Some("Basic YW5uOnNlY3JldA==") => Answer::json(&json!({"token": "for-ann"})),
                Some(_) => Answer::status(401),
                None => Answer::json(&json!({"access_token": "for-all"})),
            };
        }
        match headers.get("authorization").map(|value| value.to_str().unwrap()) {
            Some(shown) if shown == wanted => answer,
            _ => Answer::status(401).with("www-authenticate", challenge.clone()),
        }
    }
}

fn password(password: &str) -> Auth {
    Auth { username: "ann".into(), password: password.into(), ..Auth::default() }
}

#[tokio::test]
async fn passwords_are_shown_where_they_are_wanted() {
    let registry =
        Registry::lying(content(), guarded("Basic YW5uOnNlY3JldA==", "Basic realm=\"r\"".into()))
            .await;
    let folder = tempfile::tempdir().unwrap();
    let images = store(folder.path(), None);
    let name = registry.image("1");
    let error = images.pull(&name, None).await.map(|image| image.id).unwrap_err();
    assert_eq!(error.kind(), Kind::Unauthenticated);
    assert!(chain(&error).contains("wants credentials and none were given"), "{}", chain(&error));
    let error = images.pull(&name, Some(&password("guess"))).await.map(|i| i.id).unwrap_err();
    assert_eq!(error.kind(), Kind::Unauthenticated);
    assert!(chain(&error).contains("refuses the credentials"), "{}", chain(&error));
    assert!(!chain(&error).contains("guess"), "{}", chain(&error));
    images.pull(&name, Some(&password("secret"))).await.unwrap();
}

#[tokio::test]
async fn tokens_are_fetched_from_where_the_registry_says() {
    for (wanted, auth) in [("Bearer for-all", None), ("Bearer for-ann", Some(password("secret")))] {
        let tokens = Registry::lying(Content::default(), guarded("", String::new())).await;
        let realm = format!("Bearer realm=\"http://{}/token\",service=\"s\"", tokens.address);
        let registry = Registry::lying(content(), guarded(wanted, realm)).await;
        let folder = tempfile::tempdir().unwrap();
        let images = store(folder.path(), None);
        images.pull(&registry.image("1"), auth.as_ref()).await.unwrap();
        let asked = tokens.asked.lock().unwrap().clone();
        assert_eq!(asked.len(), 1, "one token for all of it: {asked:?}");
        assert!(asked[0].contains("scope=repository%3Ax%3Apull"), "{asked:?}");
        assert!(asked[0].contains("service=s"), "{asked:?}");
    }
}

#[tokio::test]
async fn a_mirror_that_lies_or_is_away_is_replaced_by_the_next() {
    let liar = Registry::lying(content(), |path, _, mut answer| {
        if a_layer(path) {
            answer.body[600] ^= 1;
        }
        answer
    })
    .await;
    let honest = Registry::honest(content()).await;
    let certs = tempfile::tempdir().unwrap();
    let hosts = certs.path().join("images.example");
    fs::create_dir(&hosts).unwrap();
    let text = format!(
        "[host.\"http://127.0.0.1:1\"]\n[host.\"http://{}\"]\n[host.\"http://{}\"]\n",
        liar.address, honest.address
    );
    fs::write(hosts.join("hosts.toml"), text).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let images = store(folder.path(), Some(certs.path()));
    let image = images.pull("images.example/x:1", None).await.unwrap();
    assert_eq!(image.repo_tags, ["images.example/x:1"]);
    let asked = honest.asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 1, "only the layer: {asked:?}");
    assert!(asked[0].ends_with("?ns=images.example"), "{asked:?}");
}

#[tokio::test]
async fn pulls_of_one_image_at_once_fetch_it_once() {
    let registry = Registry::honest(content()).await;
    let folder = tempfile::tempdir().unwrap();
    let images = store(folder.path(), None);
    let name = registry.image("1");
    let pulls = (0..20).map(|_| images.pull(&name, None));
    for pulled in futures::future::join_all(pulls).await {
        pulled.map_err(|error: ImageError| chain(&error)).unwrap();
    }
    let asked = registry.asked.lock().unwrap().clone();
    assert_eq!(
        asked.iter().filter(|one| one.contains(&Digest::of(&tar(0)).to_string())).count(),
        1
    );
}

#[tokio::test]
async fn what_a_failed_pull_left_is_used_by_the_next_or_removed() {
    let mut content = Content::default();
    content.image("1", OCI_MANIFEST, "amd64", &[PLAIN, PLAIN]);
    let second = format!("x/blobs/{}", Digest::of(&tar(1)));
    let registry = Registry::lying(content, move |path, _, answer| match path == second {
        true => Answer::status(404),
        false => answer,
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let images = store(folder.path(), None);
    refused(&images, folder.path(), &registry.image("1")).await;
    assert!(fs::read_dir(folder.path().join("layers")).unwrap().count() > 0);
    drop(images);
    drop(store(folder.path(), None));
    assert_eq!(fs::read_dir(folder.path().join("layers")).unwrap().count(), 0);
}
