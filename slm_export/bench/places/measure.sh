# Runs its arguments. What they write goes to out.txt and their process to pid.txt; the most memory that the system saw
# in it (VmHWM) is the last line of out.txt. The exit code is theirs.
"$@" > out.txt 2>&1 &
pid=$!
echo $pid > pid.txt
peak=
# A process that has ended has no such line any more, though its number may last.
while line=$(grep VmHWM /proc/$pid/status 2>/dev/null); do
    peak=$line
    sleep 0.1
done
wait $pid
code=$?
rm pid.txt
echo "$peak" >> out.txt
exit $code
