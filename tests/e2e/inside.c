/* What containers of the end-to-end tests run that busybox does not have. Linked statically.
 *
 *   inside watch PATH...    one line per inotify event: the path, the event, the name
 *   inside lock FILE        takes a lock and keeps it; ends with 7 when somebody else has it
 *   inside listen SOCKET    answers each client with one line
 *   inside call SOCKET      prints that line
 *   inside huge FILE COUNT  writes to so many huge pages of FILE, page by page; prints what the first had
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int watch(int count, char **paths)
{
	int fd = inotify_init(), first = 0;
	_Alignas(struct inotify_event) char buffer[4096];
	for (int i = 0; i < count; i++) {
		int number = inotify_add_watch(fd, paths[i], IN_MOVED_TO | IN_DELETE_SELF);
		if (number < 0)
			return 1;
		if (i == 0)
			first = number;
	}
	puts("watching");
	for (;;) {
		fflush(stdout);
		ssize_t length = read(fd, buffer, sizeof(buffer));
		for (char *at = buffer; at < buffer + length;) {
			struct inotify_event *event = (struct inotify_event *)at;
			const char *kind = event->mask & IN_MOVED_TO ? "moved-to" : event->mask & IN_DELETE_SELF ? "deleted" : "other";
			printf("%s %s %s\n", paths[event->wd - first], kind, event->len ? event->name : "");
			at += sizeof(*event) + event->len;
		}
	}
}

static int lock(const char *path)
{
	FILE *file = fopen(path, "r+");
	if (!file || flock(fileno(file), LOCK_EX | LOCK_NB))
		return 7;
	puts("locked");
	fflush(stdout);
	pause();
	return 0;
}

static int huge(const char *path, int pages)
{
	const size_t page = 2 << 20;
	int fd = open(path, O_RDWR | O_CREAT, 0600);
	char *all = mmap(NULL, pages * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (all == MAP_FAILED) {
		perror(path);
		return 1;
	}
	printf("first had %d\n", all[0]);
	for (int i = 0; i < pages; i++)
		all[i * page] = 7;
	return 0;
}

static int stream(const char *path, int listening)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char answer[64];
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	if (!listening) {
		if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
			return 1;
		ssize_t length = read(fd, answer, sizeof(answer));
		return write(1, answer, length > 0 ? length : 0) <= 0;
	}
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 4))
		return 1;
	for (;;) {
		int client = accept(fd, NULL, NULL);
		if (write(client, "answered\n", 9) != 9)
			return 1;
		close(client);
	}
}

int main(int count, char **words)
{
	if (count > 2 && !strcmp(words[1], "watch"))
		return watch(count - 2, words + 2);
	if (count == 4 && !strcmp(words[1], "huge"))
		return huge(words[2], atoi(words[3]));
	if (count == 3 && !strcmp(words[1], "lock"))
		return lock(words[2]);
	if (count == 3 && (!strcmp(words[1], "listen") || !strcmp(words[1], "call")))
		return stream(words[2], words[1][0] == 'l');
	return 64;
}
