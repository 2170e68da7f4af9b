//! ListImages.

use crate::{
    Server,
    images::{Image, ImageRpcError},
};
use a3s_box_api::cri;
use std::sync::Arc;

/// All images, or the one the filter names.
pub async fn list_images(
    server: Arc<Server>,
    request: cri::ListImagesRequest,
) -> Result<cri::ListImagesResponse, ImageRpcError> {
    let wanted = request.filter.and_then(|filter| filter.image).unwrap_or_default().image;
    let images = if wanted.is_empty() {
        server.images.list()
    } else {
        server.images.resolve(&wanted).into_iter().collect()
    };
    Ok(cri::ListImagesResponse { images: images.iter().map(image).collect() })
}

/// An image as the CRI has it.
pub fn image(image: &Image) -> cri::Image {
    let config = image.config.config().clone().unwrap_or_default();
    let (uid, username) = user(config.user().as_deref().unwrap_or_default());
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid: uid.map(|value| cri::Int64Value { value }),
        username,
        spec: None,
        pinned: image.pinned,
    }
}

/// The image's user as a number or as a name, without the group. Neither: the image says nothing.
fn user(text: &str) -> (Option<i64>, String) {
    let user = text.split(':').next().unwrap_or_default();
    match user.parse() {
        Ok(uid) => (Some(uid), String::new()),
        Err(_) => (None, user.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_images_user_is_a_number_or_a_name() {
        for (text, uid, name) in [
            ("", None, ""),
            ("1002", Some(1002), ""),
            ("www-data", None, "www-data"),
            ("1003:1004", Some(1003), ""),
            ("www-data:1004", None, "www-data"),
        ] {
            assert_eq!(user(text), (uid, name.to_owned()), "{text}");
        }
    }
}
